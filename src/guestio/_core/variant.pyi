NAME: str
CHECKS: bool
