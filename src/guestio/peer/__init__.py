"""Processes at the other end of a Unix socket, whatever protocol they speak.

``endpoint`` says where they come from, ``channel`` frames their messages, ``foreign`` judges and
closes the descriptors that they pass, and ``server`` serves one after the other.
"""
