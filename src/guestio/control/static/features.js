// Where features are specified.

const VIRTIO = "https://docs.oasis-open.org/virtio/virtio/v1.3/csd01/virtio-v1.3-csd01.html";
const VHOST_USER = "https://qemu-project.gitlab.io/qemu/interop/vhost-user.html";

// Sections of virtio 1.3, by the beginning of a feature's name.
const SECTIONS = [
  ["NET_", "5.1.3", "VIRTIO_NET_F_"],
  ["BLK_", "5.2.3", "VIRTIO_BLK_F_"],
  ["CONSOLE_", "5.3.3", "VIRTIO_CONSOLE_F_"],
  ["IOMMU_", "5.13.3", "VIRTIO_IOMMU_F_"],
  ["", "6", "VIRTIO_F_"],
];

// {name, section, url}; no url for a bit without a name.
export function featureOf(name) {
  if (name.startsWith("bit ")) return { name, section: "", url: null };
  const [start, section, full] = SECTIONS.find(([prefix]) => name.startsWith(prefix));
  const whole = full + name.slice(start.length);
  return { name: whole, section: `virtio 1.3 \u00a7 ${section}`, url: `${VIRTIO}#:~:text=${whole}` };
}

export function protocolFeatureOf(name) {
  const whole = `VHOST_USER_PROTOCOL_F_${name}`;
  return { name: whole, section: "vhost-user", url: `${VHOST_USER}#:~:text=${whole}` };
}
