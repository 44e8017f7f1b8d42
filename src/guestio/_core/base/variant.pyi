NAME: str
COMPILER: str
CHECKS: bool
CAPACITIES: dict[str, int]
