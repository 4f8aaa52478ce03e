mkdir modes; for name in setuid setgid sticky none all exec read; do echo $name > modes/$name; done
chmod 4755 modes/setuid; chmod 2755 modes/setgid; chmod 1644 modes/sticky; chmod 000 modes/none; chmod 777 modes/all
chmod 751 modes/exec; chmod 440 modes/read
mkdir modes/shared modes/private modes/sgid; chmod 1777 modes/shared; chmod 700 modes/private; chmod 2775 modes/sgid
echo in > modes/private/in
