"""vhost-user: virtio devices and their queues in another process, over a Unix socket.

`messages` is the wire format, `channel` moves messages and fds over a socket, `session` is the
back-end's side of the protocol without any I/O.
"""
