"""Names of feature bits: of every virtio device, and of a type (virtio 1.3, sections 5 and 6)."""

from __future__ import annotations

from typing import Final

COMMON: Final = {
    24: "NOTIFY_ON_EMPTY",
    27: "ANY_LAYOUT",
    28: "INDIRECT_DESC",
    29: "EVENT_IDX",
    32: "VERSION_1",
    33: "ACCESS_PLATFORM",
    34: "RING_PACKED",
    35: "IN_ORDER",
    36: "ORDER_PLATFORM",
    37: "SR_IOV",
    38: "NOTIFICATION_DATA",
    39: "NOTIF_CONFIG_DATA",
    40: "RING_RESET",
}
"""Bits that mean the same for every type."""

NET: Final = {
    0: "NET_CSUM",
    1: "NET_GUEST_CSUM",
    2: "NET_CTRL_GUEST_OFFLOADS",
    3: "NET_MTU",
    5: "NET_MAC",
    7: "NET_GUEST_TSO4",
    8: "NET_GUEST_TSO6",
    9: "NET_GUEST_ECN",
    10: "NET_GUEST_UFO",
    11: "NET_HOST_TSO4",
    12: "NET_HOST_TSO6",
    13: "NET_HOST_ECN",
    14: "NET_HOST_UFO",
    15: "NET_MRG_RXBUF",
    16: "NET_STATUS",
    17: "NET_CTRL_VQ",
    18: "NET_CTRL_RX",
    19: "NET_CTRL_VLAN",
    21: "NET_GUEST_ANNOUNCE",
    22: "NET_MQ",
    23: "NET_CTRL_MAC_ADDR",
}
BLK: Final = {
    1: "BLK_SIZE_MAX",
    2: "BLK_SEG_MAX",
    4: "BLK_GEOMETRY",
    5: "BLK_RO",
    6: "BLK_BLK_SIZE",
    9: "BLK_FLUSH",
    10: "BLK_TOPOLOGY",
    11: "BLK_CONFIG_WCE",
    12: "BLK_MQ",
    13: "BLK_DISCARD",
    14: "BLK_WRITE_ZEROES",
    15: "BLK_LIFETIME",
    16: "BLK_SECURE_ERASE",
    17: "BLK_ZONED",
}
CONSOLE: Final = {0: "CONSOLE_SIZE", 1: "CONSOLE_MULTIPORT", 2: "CONSOLE_EMERG_WRITE"}
IOMMU: Final = {
    0: "IOMMU_INPUT_RANGE",
    1: "IOMMU_DOMAIN_RANGE",
    2: "IOMMU_MAP_UNMAP",
    3: "IOMMU_BYPASS",
    4: "IOMMU_PROBE",
    5: "IOMMU_MMIO",
    6: "IOMMU_BYPASS_CONFIG",
}
OF_TYPE: Final[dict[int, dict[int, str]]] = {1: NET, 2: BLK, 3: CONSOLE, 23: IOMMU}
"""Bits by device type."""


def feature_names(features: int, device_id: int) -> list[str]:
    """The bits that are set, by name; ``bit N`` for one that has none here.

    Args:
        features: Feature bits.
        device_id: The device's type.
    """
    names = COMMON | OF_TYPE.get(device_id, {})
    return [
        names.get(bit, f"bit {bit}") for bit in range(features.bit_length()) if features >> bit & 1
    ]
