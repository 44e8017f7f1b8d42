"""A running server, watched from outside: HTTP over a Unix socket, or TCP.

``schema`` says what ``/status`` returns, ``status`` how it comes about, ``metrics`` makes
OpenMetrics of it, ``explain`` says what an address leads to, ``survey`` what a range has. ``app``
answers requests, ``server`` listens, in a thread of its own that the data path never waits for;
``page`` has the inspector's files, ``relay`` serves them to a browser for a socket elsewhere.
``client`` asks, ``summary`` writes it down for people.
"""
