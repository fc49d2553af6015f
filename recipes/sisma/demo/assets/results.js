// The results, and which one is chosen. An edit sends the chosen one back, because the server keeps nothing.
const storage = "ssmgen-results-" + props.store;
const find = (what) => element.querySelector(what);
let shown = null, at = 0;

function setFigure(figure, address, text) {
  find(figure + " img").src = address;
  find(figure + " img").alt = text;
  find(figure + " figcaption").textContent = text;
}

function choose(index) {
  at = index;
  const image = shown.images[at];
  setFigure(".first", shown.before || shown.mask_png, shown.before ? "before" : "mask");
  find(".first img").classList.toggle("mask", !shown.before);
  setFigure(".second", image.png, shown.before ? "after, " + image.name : image.name);
  find(".under").src = image.png;
  find(".under").alt = "the image";
  find(".over").src = shown.mask_png;
  find(".over").alt = "its mask";
  element.querySelectorAll(".strip button").forEach((button, i) => {
    button.classList.toggle("chosen", i === at);
    button.setAttribute("aria-pressed", i === at);
  });
  // Stored as well as announced: the listener in chosen.js exists only once its section was opened.
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
const setOpacity = () => { find(".over").style.opacity = blend.value / 100; };
blend.addEventListener("input", setOpacity);
setOpacity();

watch("value", () => {
  if (!props.value) return;
  show(props.value);
  try { sessionStorage.setItem(storage, JSON.stringify(props.value)); } catch (error) { sessionStorage.removeItem(storage); }
});
let saved = null;
try { saved = JSON.parse(sessionStorage.getItem(storage)); } catch (error) { /* nothing usable was saved */ }
if (saved) show(saved);
