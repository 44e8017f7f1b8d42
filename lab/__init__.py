"""The lab: boots unmodified Linux guests under QEMU, without KVM, for the system tests.

Development tooling, not part of the installed package.

* `lab.parts` fetches and caches what is not on the machine (the guest kernel).
* `lab.initramfs` packs a root file system from busybox, modules, scripts and host programs.
* `lab.guest` joins them with disks and a vIOMMU into a running guest, and reads its report.
* `lab/scripts/*.sh` is what runs inside.
"""
