"""Sessions, one state machine per protocol, and the zombie checker."""
