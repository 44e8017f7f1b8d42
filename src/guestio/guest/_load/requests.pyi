from typing import Self

from typing_extensions import disjoint_base

from guestio.guest._load.iotlb_front import IotlbFront

@disjoint_base
class RequestMaker:
    """Chooses blocks, lays requests for them out, and judges the answers.

    Made by a :class:`~guestio.guest._load.load.LoadDriver`, whose arguments these are.
    """
    def __new__(
        cls,
        block: int,
        blocks: int,
        iotlb: IotlbFront | None,
        strict: bool,
        stride: int,
        separate: bool,
        indirect: bool,
        verify: bool,
        seed: int,
    ) -> Self: ...
