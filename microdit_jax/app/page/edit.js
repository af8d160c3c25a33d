// The image that is to be changed: chosen, fitted to a square, and painted over where it is made anew.
const SIDE = 256; // pixels of the square that is shown, at least
const MOST = 1024; // and sent, at most
const $ = (id) => document.getElementById(id);
let source = null; // a canvas with the square of the chosen image
let mask = null; // a canvas, white where it was painted
let painting = null; // the last point of the stroke

export function setUpEdit(sideOf, complain) {
  $("image-file").addEventListener("change", async () => {
    const [file] = $("image-file").files;
    if (!file) return;
    try {
      load(await createImageBitmap(file), Math.min(MOST, Math.max(SIDE, sideOf())));
    } catch {
      complain("error", "the browser cannot read this image; choose a PNG, JPEG or WebP");
      remove();
    }
  });
  $("image-remove").addEventListener("click", remove);
  $("mask-clear").addEventListener("click", clear);
  $("strength").addEventListener("input", show);
  const canvas = $("edit-canvas");
  canvas.addEventListener("pointerdown", (event) => {
    canvas.setPointerCapture(event.pointerId);
    painting = point(event);
    paint(event);
  });
  canvas.addEventListener("pointermove", (event) => { if (painting) paint(event); });
  for (const end of ["pointerup", "pointercancel"]) {
    canvas.addEventListener(end, () => { painting = null; });
  }
  show();
}

// What a request has of it: nothing, or an image with a strength, and a mask if one was painted.
export function edit() {
  if (!source) return {};
  const form = source.width > 512 ? "image/jpeg" : "image/png";
  const chosen = { image: source.toDataURL(form, 0.95), strength: Number($("strength").value) };
  return mask.painted ? { ...chosen, mask: mask.toDataURL("image/png") } : chosen;
}

function square(side) {
  const canvas = document.createElement("canvas");
  canvas.width = canvas.height = side;
  return canvas;
}

function load(bitmap, side) {
  source = square(side);
  const least = Math.min(bitmap.width, bitmap.height);
  const context = source.getContext("2d");
  context.fillStyle = "white"; // under what is transparent
  context.fillRect(0, 0, side, side);
  context.drawImage(bitmap, (bitmap.width - least) / 2, (bitmap.height - least) / 2, least, least, 0, 0, side, side);
  clear();
}

function clear() {
  mask = square(source.width);
  mask.painted = false;
  const context = mask.getContext("2d");
  context.fillStyle = "black";
  context.fillRect(0, 0, mask.width, mask.height);
  show();
}

function remove() {
  source = mask = null;
  $("image-file").value = "";
  show();
}

function point(event) {
  const box = $("edit-canvas").getBoundingClientRect();
  const scale = source.width / box.width;
  return [(event.clientX - box.left) * scale, (event.clientY - box.top) * scale];
}

function paint(event) {
  const context = mask.getContext("2d"), to = point(event);
  context.strokeStyle = "white";
  context.lineWidth = source.width / 8;
  context.lineCap = "round";
  context.beginPath();
  context.moveTo(...painting);
  context.lineTo(...to);
  context.stroke();
  mask.painted = true;
  painting = to;
  show();
}

function show() {
  $("edit").hidden = !source;
  $("strength-shown").textContent = Number($("strength").value).toFixed(2);
  $("mask-clear").hidden = !mask?.painted;
  if (!source) return;
  const canvas = $("edit-canvas"), context = canvas.getContext("2d");
  canvas.width = canvas.height = source.width;
  context.drawImage(source, 0, 0);
  if (!mask.painted) return;
  context.globalAlpha = 0.6;
  context.globalCompositeOperation = "screen"; // black changes nothing, white is laid over
  context.drawImage(mask, 0, 0);
  context.globalAlpha = 1;
  context.globalCompositeOperation = "source-over";
}
