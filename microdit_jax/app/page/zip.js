// A ZIP archive of files as they are (PNGs are compressed already), made in the browser.
const TABLE = Uint32Array.from({ length: 256 }, (_, n) => {
  for (let k = 0; k < 8; k++) n = n & 1 ? 0xedb88320 ^ (n >>> 1) : n >>> 1;
  return n;
});

function crc32(bytes) {
  let crc = ~0;
  for (const byte of bytes) crc = TABLE[(crc ^ byte) & 0xff] ^ (crc >>> 8);
  return ~crc >>> 0;
}

// Fields of a record, each as [number of bytes, value], little-endian.
function record(...fields) {
  const view = new DataView(new ArrayBuffer(fields.reduce((sum, [size]) => sum + size, 0)));
  let at = 0;
  for (const [size, value] of fields) {
    size === 4 ? view.setUint32(at, value, true) : view.setUint16(at, value, true);
    at += size;
  }
  return new Uint8Array(view.buffer);
}

// files: [{ name, bytes }]; of equal names the later ones get a number.
export function zip(files) {
  const parts = [], directory = [], taken = new Set();
  let offset = 0, size = 0;
  for (const { name, bytes } of files) {
    let unique = name;
    for (let n = 2; taken.has(unique); n++) unique = name.replace(/(\.\w+)?$/, `_${n}$1`);
    taken.add(unique);
    const named = new TextEncoder().encode(unique);
    // Version, UTF-8 names, stored, 1 January 1980, checksum, sizes, lengths of name and extras.
    const about = [
      [2, 20], [2, 0x800], [2, 0], [2, 0], [2, 33], [4, crc32(bytes)], [4, bytes.length],
      [4, bytes.length], [2, named.length], [2, 0],
    ];
    const local = record([4, 0x04034b50], ...about);
    const central = record([4, 0x02014b50], [2, 20], ...about, [2, 0], [2, 0], [2, 0], [4, 0], [4, offset]);
    parts.push(local, named, bytes);
    directory.push(central, named);
    offset += local.length + named.length + bytes.length;
    size += central.length + named.length;
  }
  const count = taken.size;
  const end = record([4, 0x06054b50], [2, 0], [2, 0], [2, count], [2, count], [4, size], [4, offset], [2, 0]);
  return new Blob([...parts, ...directory, end], { type: "application/zip" });
}
