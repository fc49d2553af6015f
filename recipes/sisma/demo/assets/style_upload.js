// A picture and its mask, as text in the request; the server does not store them. The picture is reduced here, because
// the model sees it at its own size anyway.
const prompts = { picture: "Upload a picture", mask: "Upload its mask (PNG)" };
const inputs = [...element.querySelectorAll("input")];
let files = {};
if (!props.regional) inputs[1].closest("label").hidden = true;

function reset() {
  files = {};
  inputs.forEach((input) => { input.value = ""; input.nextElementSibling.textContent = prompts[input.dataset.file]; });
}

async function reduced(file) {
  try {
    const bitmap = await createImageBitmap(file);
    const scale = Math.min(1, props.longest / Math.max(bitmap.width, bitmap.height));
    const canvas = document.createElement("canvas"), context = canvas.getContext("2d");
    canvas.width = Math.max(1, Math.round(bitmap.width * scale));
    canvas.height = Math.max(1, Math.round(bitmap.height * scale));
    context.imageSmoothingQuality = "high";
    context.fillStyle = "white";
    context.fillRect(0, 0, canvas.width, canvas.height);
    context.drawImage(bitmap, 0, 0, canvas.width, canvas.height);
    return canvas.toDataURL("image/png").split(",")[1];
  } catch (error) { return ""; }  // the server says that it is no picture
}

function asText(file) {
  // A file above the limit is not sent: a text that is too long makes the server answer with its message.
  if (file.size > props.max_bytes) return Promise.resolve("A".repeat(props.max_bytes * 4 / 3 + 8));
  return new Promise((resolve) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result.split(",")[1] || "");
    reader.onerror = () => resolve("");
    reader.readAsDataURL(file);
  });
}

inputs.forEach((input) => input.addEventListener("change", async () => {
  const file = input.files[0], kind = input.dataset.file;
  if (!file) return;
  input.nextElementSibling.textContent = file.name;
  files[kind] = await (kind === "picture" ? reduced(file) : asText(file));
  if (!("picture" in files) || (props.regional && !("mask" in files))) return;
  props.value = { picture: files.picture, mask: files.mask || "" };
  trigger("upload");
}));
watch("value", () => { if (!props.value) reset(); });
reset();
