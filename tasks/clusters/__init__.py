"""Hosts that are held: by runs, and by nobody but their own record; lists of them, and their return."""
