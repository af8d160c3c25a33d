// The images of earlier requests, which this browser remembers, and the dialog about one of them.
import { zip } from "/zip.js";

const $ = (id) => document.getElementById(id);
const KEPT = "microdit_jax gallery"; // in this browser: settings and image names, no images
const MOST_KEPT = 60;
const SMALL = 128; // pixels; images up to here are shown pixel by pixel
const figures = new Map(); // by the image's name
let entries = [];
let shown = null; // the entry in the dialog

export const address = (entry) => `/images/${encodeURIComponent(entry.name)}`;

export function element(tag, text) {
  const made = document.createElement(tag);
  made.textContent = text; // never as HTML: prompts are shown as they are
  return made;
}

export function imageTile(source, words = "") {
  const tile = element("button", "");
  const image = document.createElement("img");
  tile.type = "button";
  tile.className = "image";
  image.alt = words;
  image.hidden = true;
  tile.append(image);
  if (source) setImage(tile, source);
  return tile;
}

export function setImage(tile, source) {
  const image = tile.firstElementChild;
  image.addEventListener("load", () => sharpen(image), { once: true });
  image.src = source;
  image.hidden = false;
}

function sharpen(image) {
  image.classList.toggle("small", image.naturalWidth <= SMALL);
}

// `again` and `use` take the settings of the image in the dialog.
export function setUpGallery({ again, use }) {
  entries = read();
  render();
  // Another tab has added, deleted or cleared.
  window.addEventListener("storage", (event) => {
    if (event.key === KEPT || event.key === null) { entries = read(); render(); }
  });
  $("clear").addEventListener("click", () => {
    const many = entries.length === 1 ? "the image" : `all ${entries.length} images`;
    if (confirm(`Remove ${many} from the gallery? The settings of each are lost with it.`)) change(() => []);
  });
  $("download-all").addEventListener("click", downloadAll);

  const dialog = $("details");
  $("close").addEventListener("click", () => dialog.close());
  dialog.addEventListener("click", (event) => { if (event.target === dialog) dialog.close(); });
  $("use").addEventListener("click", () => { dialog.close(); use(shown.request); });
  $("again").addEventListener("click", () => { dialog.close(); again(shown.request); });
  $("copy").addEventListener("click", copyLink);
  $("delete").addEventListener("click", () => {
    const next = figures.get(shown.name)?.nextElementSibling ?? $("gallery").firstElementChild;
    dialog.close();
    change((kept) => kept.filter((entry) => entry.name !== shown.name));
    next?.querySelector("button")?.focus();
  });
  // The browser's "back" closes the dialog, and leaves the page only from there.
  if (history.state?.dialog) history.replaceState(null, "");
  dialog.addEventListener("close", () => { if (history.state?.dialog) history.back(); });
  window.addEventListener("popstate", () => { if (dialog.open) dialog.close(); });
}

export function add(found) {
  change((kept) => {
    const names = new Set(kept.map((entry) => entry.name));
    return [...found.filter((entry) => !names.has(entry.name)).reverse(), ...kept];
  });
}

// Reads what other tabs have written since, changes it, and writes it.
function change(how) {
  entries = how(read()).slice(0, MOST_KEPT);
  try {
    localStorage.setItem(KEPT, JSON.stringify(entries));
  } catch { /* a private window without storage: the gallery lasts as long as the page */ }
  render();
}

function read() {
  try {
    const kept = JSON.parse(localStorage.getItem(KEPT)) ?? [];
    return kept.filter((entry) => typeof entry.name === "string" && typeof entry.request?.prompt === "string");
  } catch {
    return entries; // written by another version, or storage is off
  }
}

// Figures that stay are not moved, so that one with the focus keeps it.
function render() {
  $("gallery-head").hidden = entries.length === 0;
  const names = new Set(entries.map((entry) => entry.name));
  for (const [name, figure] of figures) {
    if (!names.has(name)) { figure.remove(); figures.delete(name); }
  }
  let next = $("gallery").firstElementChild;
  for (const entry of entries) {
    const figure = figures.get(entry.name) ?? makeFigure(entry);
    if (figure === next) next = next.nextElementSibling;
    else $("gallery").insertBefore(figure, next);
  }
}

function makeFigure(entry) {
  const figure = element("figure", "");
  const tile = imageTile(address(entry), entry.request.prompt);
  tile.addEventListener("click", () => open(entry));
  tile.firstElementChild.addEventListener("error", () => {
    // The server keeps the newest images only; the settings of all are here.
    tile.replaceChildren(element("span", "no longer kept; press to see its settings"));
    tile.classList.add("gone");
  }, { once: true });
  const caption = element("figcaption", entry.request.prompt);
  caption.title = entry.request.prompt;
  figure.append(tile, caption);
  figures.set(entry.name, figure);
  return figure;
}

export function open(entry) {
  const request = entry.request;
  shown = entry;
  $("details-image").src = address(entry);
  $("details-image").addEventListener("load", () => sharpen($("details-image")), { once: true });
  $("details-prompt").textContent = request.prompt;
  const rows = {
    Model: request.model,
    Guidance: request.guidance_scale,
    Steps: request.num_inference_steps,
    Seed: request.seed,
    Image: `${entry.index + 1} of ${request.count}`,
  };
  if (request.solver) rows.Solver = `${request.solver}, ${request.guidance}`;
  if (request.negative_prompt) rows.Without = request.negative_prompt;
  if (request.strength) rows.Strength = request.strength;
  $("details-settings").replaceChildren(
    ...Object.entries(rows).flatMap(([name, value]) => [element("dt", name), element("dd", String(value))]),
  );
  $("download").href = address(entry);
  $("copy").textContent = "Copy link";
  history.pushState({ dialog: true }, "");
  $("details").showModal();
}

// A link that opens the page with these settings; an image that was changed does not travel.
async function copyLink() {
  const { strength, keep, ...request } = shown.request;
  const link = `${location.origin}${location.pathname}#${new URLSearchParams(request)}`;
  try {
    await navigator.clipboard.writeText(link);
    $("copy").textContent = "Copied";
  } catch { // not on https or localhost, or not allowed
    prompt("The link to these settings:", link);
  }
}

async function downloadAll() {
  const files = [];
  $("download-all").textContent = "Collecting";
  for (const entry of entries) {
    const answer = await fetch(address(entry)).catch(() => null);
    if (!answer?.ok) continue; // no longer kept
    const named = /filename\*=UTF-8''(\S+)/.exec(answer.headers.get("Content-Disposition"));
    files.push({ name: decodeURIComponent(named?.[1] ?? "image.png"), bytes: new Uint8Array(await answer.arrayBuffer()) });
  }
  $("download-all").textContent = files.length ? "Download all" : "None is kept any more";
  if (!files.length) return;
  const link = document.createElement("a");
  link.href = URL.createObjectURL(zip(files));
  link.download = "microdit_jax.zip";
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
}
