"""What tools/dev needs besides bash. Runs on /usr/bin/python3 with the standard library alone."""
