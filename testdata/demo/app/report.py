import os
import platform
import pwd
import subprocess


def lines(name, version):
    user = pwd.getpwuid(os.getuid())
    answer = subprocess.run(["hello", name], check=True, capture_output=True, text=True)
    owner = pwd.getpwuid(os.stat(__file__).st_uid).pw_name
    yield f"kiln-demo {version}"
    yield f"  user      {user.pw_name} (uid {user.pw_uid}), in {os.getcwd()}"
    yield f"  process   pid {os.getpid()} on host {platform.node()}"
    yield f"  python    {platform.python_version()}"
    yield f"  files     owned by {owner}"
    yield f"  hello.c   {answer.stdout.strip()}"
