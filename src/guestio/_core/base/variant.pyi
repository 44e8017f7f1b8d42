NAME: str
CHECKS: bool
CAPACITIES: dict[str, int]
