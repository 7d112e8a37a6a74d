// Run model.onnx on an image that is dropped, and draw what it finds; see README.md.

const parts = Object.fromEntries(
  ["drop", "file", "say", "canvas", "list", "least", "shown"].map((id) => [id, document.getElementById(id)]),
);
const say = (text) => (parts.say.textContent = text);
let session, names, last;

async function load() {
  ort.env.wasm.wasmPaths = new URL("onnxruntime-web/dist/", location.href).href;
  ort.env.wasm.numThreads = 1; // more need headers that few static servers send
  session = await ort.InferenceSession.create("model.onnx");
  names = await (await fetch("classes.json")).json();
  if (session.inputNames.length > 1) throw new Error("this model needs boxes, which the page does not make");
  say("Ready.");
}

// RGBA, pixel by pixel -> [1, 3, height, width]
function toTensor({ data, width, height }) {
  const size = width * height;
  const planes = new Uint8Array(3 * size);
  for (let pixel = 0; pixel < size; pixel++)
    for (let channel = 0; channel < 3; channel++) planes[channel * size + pixel] = data[4 * pixel + channel];
  return new ort.Tensor("uint8", planes, [1, 3, height, width]);
}

async function detect(file) {
  const bitmap = await createImageBitmap(file);
  const canvas = Object.assign(document.createElement("canvas"), { width: bitmap.width, height: bitmap.height });
  const context = canvas.getContext("2d");
  context.drawImage(bitmap, 0, 0);
  say("Looking ...");
  const began = performance.now();
  const found = await session.run({ images: toTensor(context.getImageData(0, 0, bitmap.width, bitmap.height)) });
  const count = Number(found.count.data[0]);
  const objects = Array.from({ length: count }, (_, index) => ({
    name: names[Number(found.labels.data[index]) - 1],
    score: found.scores.data[index],
    box: Array.from(found.boxes.data.slice(4 * index, 4 * index + 4)),
  }));
  last = { bitmap, objects, milliseconds: performance.now() - began };
  draw();
}

function draw() {
  parts.shown.textContent = parts.least.value;
  if (!last) return;
  const { bitmap, objects, milliseconds } = last;
  const { canvas } = parts;
  const shown = objects.filter(({ score }) => score >= Number(parts.least.value));
  Object.assign(canvas, { width: bitmap.width, height: bitmap.height, hidden: false });
  const context = canvas.getContext("2d");
  context.drawImage(bitmap, 0, 0);
  context.lineWidth = Math.max(2, bitmap.width / 300);
  context.font = `${Math.max(12, bitmap.width / 50)}px sans-serif`;
  context.textBaseline = "bottom";
  for (const { name, score, box } of shown) {
    const [left, top, right, bottom] = box;
    context.strokeStyle = context.fillStyle = `hsl(${(names.indexOf(name) * 67) % 360} 90% 45%)`;
    context.strokeRect(left, top, right - left, bottom - top);
    context.fillText(`${name} ${score.toFixed(2)}`, left, Math.max(top, 20));
  }
  parts.list.replaceChildren(
    ...shown.map(({ name, score, box }) =>
      Object.assign(document.createElement("li"), {
        textContent: `${name} ${score.toFixed(3)} at ${box.map((side) => side.toFixed(1)).join(", ")}`,
      }),
    ),
  );
  say(`${shown.length} of ${objects.length} objects, ${milliseconds.toFixed(0)} ms.`);
}

const fail = (error) => say(`Error: ${error.message ?? error}`);
const ready = load();
const start = (file) => file && ready.then(() => detect(file)).catch(fail);
parts.file.addEventListener("change", () => start(parts.file.files[0]));
parts.least.addEventListener("input", draw);
for (const kind of ["dragenter", "dragover", "dragleave", "drop"])
  parts.drop.addEventListener(kind, (event) => {
    event.preventDefault();
    parts.drop.classList.toggle("over", kind === "dragenter" || kind === "dragover");
    if (kind === "drop") start(event.dataTransfer.files[0]);
  });
ready.catch(fail);
