"""IOTLB messages in bulk and the misses in flight: a feed of the event loop."""
