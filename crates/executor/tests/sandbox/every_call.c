/* Makes every system call with arguments that none accepts, each in a process of its own, and
 * prints what came back: "KIND NUMBER ERRNO", 0 for success, -1 when the call did not return. */
#define _GNU_SOURCE
#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define CALLS 1200
struct result { volatile int done, error; };
static struct result *results;
static pid_t children[CALLS];
static struct { const char *kind; long number, first; } asked[CALLS];
static int count;

static long old_gate(long number, long first)
{
	long back;
#ifdef __x86_64__
	__asm__ volatile("int $0x80" : "=a"(back) : "a"(number), "b"(first), "c"(-1L), "d"(-1L), "S"(-1L), "D"(-1L)
			 : "memory", "r8", "r9", "r10", "r11");
	back = (int)back;
#else
	back = -ENOSYS;
#endif
	return back;
}

static void call(const char *kind, long number, long first)
{
	int mine = count++;
	asked[mine].kind = kind;
	asked[mine].number = number;
	asked[mine].first = first;
	pid_t child = fork();
	if (child) {
		children[mine] = child;
		return;
	}
	long back;
	int error = 0;
	if (!strcmp(kind, "x86")) {
		back = old_gate(number, first);
		error = back < 0 && back > -4096 ? -back : 0;
	} else {
		errno = 0;
		back = syscall(number, first, -1L, -1L, -1L, -1L, -1L);
		error = back == -1 ? errno : 0;
	}
	results[mine].error = error;
	results[mine].done = 1;
	_exit(0);
}

int main(void)
{
	results = mmap(0, sizeof *results * CALLS, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	for (long number = 0; number <= 480; number++)
		if (number != SYS_clone && number != SYS_socket && number != SYS_personality)
			call("native", number, -1);
	for (long family = 0; family <= 47; family++)
		call("socket", SYS_socket, family);
	call("socket", SYS_socket, 0x100000001L);
	static const long personalities[] = { 0, 8, 0x20000, 0x20008, 0xffffffff, 0x40000, 0x1, 0x100000000L };
	for (unsigned at = 0; at < sizeof personalities / sizeof *personalities; at++)
		call("personality", SYS_personality, personalities[at]);
	for (int bit = 0; bit < 32; bit++)
		call("clone", SYS_clone, 1L << bit);
#ifdef __x86_64__
	static const long old[] = { 20, 21, 22, 26, 39, 52, 61, 120, 128, 286, 287, 288, 310, 346, 357, 425, 434, 435, 600 };
	for (unsigned at = 0; at < sizeof old / sizeof *old; at++)
		call("x86", old[at], -1);
	call("x86", 359, 38);
	static const long x32[] = { 39, 83, 161, 165, 246, 250, 272, 321, 435, 521, 544, 600 };
	for (unsigned at = 0; at < sizeof x32 / sizeof *x32; at++)
		call("x32", x32[at] | 0x40000000, -1);
#endif
	/* Those that wait for something never come back by themselves. */
	struct timespec tick = { 0, 10000000 };
	int left = count;
	for (int turn = 0; turn < 300 && left; turn++) {
		while (waitpid(-1, 0, WNOHANG) > 0)
			left--;
		int open = 0;
		for (int at = 0; at < count; at++)
			open += !results[at].done && !kill(children[at], 0);
		if (!open || turn > 100)
			break;
		nanosleep(&tick, 0);
	}
	for (int at = 0; at < count; at++) {
		kill(children[at], SIGKILL);
		int args = !strcmp(asked[at].kind, "native") || !strcmp(asked[at].kind, "x86") || !strcmp(asked[at].kind, "x32");
		printf("%s %ld %d\n", asked[at].kind, args ? asked[at].number & 0x3fffffff : asked[at].first,
		       results[at].done ? results[at].error : -1);
	}
	return 0;
}
