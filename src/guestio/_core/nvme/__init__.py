"""NVMe queues: submission entries in, data moved, completion entries out."""
