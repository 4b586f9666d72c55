"""Which weights stay, and what the kept ones become: one file per paper."""
