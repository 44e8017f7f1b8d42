"""The catalogue for virtio-iommu devices: QEMU's, a vhost-user back-end's, or one of this process.

``driver`` is what a driver has whatever the device is, ``ports`` devices that are reached without
a VM, ``qtest`` QEMU's; ``trial`` is what a check works with, ``runner`` runs them.
"""
