"""Other libraries doing the same work, each a script in a process of its own (`peer.py`)."""
