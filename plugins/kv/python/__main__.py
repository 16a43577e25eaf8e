"""Begins here when the folder was packed: python3 -m zipapp -p /usr/bin/python3 -o kv-py plugins/kv/python"""

import kv

kv.main()
