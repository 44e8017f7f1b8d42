"""The compiled core: interval maps, raw memory access, virtqueue walking.

Plain integers in and out; it knows no sockets, devices or ioctls. Everything above uses the
classes re-exported by the public packages, not these modules.
"""
