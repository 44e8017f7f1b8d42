"""A conformance catalogue for vfio-user servers, run without a virtual machine."""
