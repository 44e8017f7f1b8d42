"""The other direction: a back-end that judges its front-end, and the guest's driver behind it."""
