"""``farspan doctor``: what this machine and cluster have, what a run would do with it, and what to mend.

Each file looks at one thing and returns a ``Section`` (``report``); ``examination`` puts them together, ``page`` prints
them, ``command`` is the command line.
"""
