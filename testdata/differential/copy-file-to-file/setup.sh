echo hi > f
printf '#!/bin/sh\necho hi\n' > exec.sh; chmod 755 exec.sh
