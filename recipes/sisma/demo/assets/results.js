// The results and which of them is chosen. The chosen one is sent back with an edit; the server keeps nothing.
const storage = "ssmgen-results-" + props.store;
const find = (what) => element.querySelector(what);
let shown = null, at = 0;

function put(figure, address, words) {
  find(figure + " img").src = address;
  find(figure + " img").alt = words;
  find(figure + " figcaption").textContent = words;
}

function choose(index) {
  at = index;
  const image = shown.images[at];
  put(".first", shown.before || shown.mask_png, shown.before ? "before" : "mask");
  find(".first img").classList.toggle("mask", !shown.before);
  put(".second", image.png, shown.before ? "after, " + image.name : image.name);
  find(".under").src = image.png;
  find(".under").alt = "the image";
  find(".over").src = shown.mask_png;
  find(".over").alt = "its mask";
  element.querySelectorAll(".strip button").forEach((button, i) => {
    button.classList.toggle("chosen", i === at);
    button.setAttribute("aria-pressed", i === at);
  });
  // Kept as well as told: the part that listens is made only when it is opened.
  window.ssmgenChosen = { png: image.png, mask: shown.mask, name: image.name };
  document.dispatchEvent(new Event("ssmgen-chosen"));
}

function show(results) {
  shown = results;
  find(".empty").hidden = true;
  find(".work").hidden = false;
  find(".title").textContent = shown.title;
  find(".caption").textContent = shown.caption;
  const bytes = Uint8Array.from(atob(shown.zip), (letter) => letter.charCodeAt(0));
  URL.revokeObjectURL(find(".save").href);
  find(".save").href = URL.createObjectURL(new Blob([bytes], { type: "application/zip" }));
  find(".strip").replaceChildren(...shown.images.map((image, i) => {
    const button = document.createElement("button"), picture = document.createElement("img");
    button.type = "button";
    button.title = button.ariaLabel = "Choose " + image.name;
    picture.src = image.png;
    picture.alt = image.name;
    button.append(picture);
    button.addEventListener("click", () => choose(i));
    return button;
  }));
  choose(0);
}

const blend = find("input");
const mix = () => { find(".over").style.opacity = blend.value / 100; };
blend.addEventListener("input", mix);
mix();

watch("value", () => {
  if (!props.value) return;
  show(props.value);
  try { sessionStorage.setItem(storage, JSON.stringify(props.value)); } catch (error) { sessionStorage.removeItem(storage); }
});
let kept = null;
try { kept = JSON.parse(sessionStorage.getItem(storage)); } catch (error) { /* nothing that can be shown again */ }
if (kept) show(kept);
