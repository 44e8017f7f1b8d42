"""The compiled part of the load generator: a driver whose requests cost next to nothing."""
