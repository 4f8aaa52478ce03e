# A tar whose files have user.* xattrs and capabilities: no program of a small machine sets them.
base64 -d << END | xz -d | tar --xattrs --xattrs-include='*' -xf -
/Td6WFoAAATm1rRGAgAhARwAAAAQz1jM4Cf/AWpdABcLxoeSWjunj8clDrgP8YrJCHEv+jLlDxEK
FyAzjSI++HqwDDjPRtPy2qSGio0S0IKr9otVf0RB6uWN8FSy9etgf0mvObelFd+/NlDVZwzYGw6p
1cLFQBJGq+2ABCgzEWcExlWwjbbLwlEaKrHmYlN/LbfL0ssbaNlImk1e8qToRgjcCvk5DgWq8sF2
3DqtePFYD/7PX0dIySOW+A8TtV5NWviuHMhcddLY78ylQAhi05lg1Fue1ReOkHl/2MtsKlFACXIk
7AgaqCKZ5Lkt7xLFeMYhtmlyoOXC0t9WdMb2Hx8UVI+xJXWMQ42z7hhqVdDlkGPa6YEJ6EybXi2i
LcVMuBeoWE6njwncFZWO53p42ZnpmL3XtTSVO0FPUl5s8W+VzrKSuiemkvSzrcD6oiYzUKuBysEW
zQLuRpPDOwUOvZSflPsPDwAapb/6vyxkxRuBF5b/iZsXiNPvjuE02IlTOeGnYJgoxjbRAAAALmso
saxriz4AAYYDgFAAAEPB+c2xxGf7AgAAAAAEWVo=
END
