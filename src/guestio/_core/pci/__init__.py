"""PCI functions' part of the core: registers that are written without entering Python."""
