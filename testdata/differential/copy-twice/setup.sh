echo first > a; echo second > b; chmod 755 b
