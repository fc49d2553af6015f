// The picture whose style is asked for: an example, the chosen result, an uploaded picture, or none.
const find = (what) => element.querySelector(what);
find(".heading").textContent = props.heading;
find(".style").setAttribute("aria-label", props.heading);

function show() {
  const chosen = props.value, picture = find(".now img");
  picture.hidden = !chosen;
  if (chosen) { picture.src = chosen.png; picture.alt = chosen.name; }
  find(".now span").textContent = chosen ? "Colours and textures of " + chosen.name + "." : "None: the model chooses the colours.";
  element.querySelectorAll("[data-example]").forEach((button, i) => {
    const pressed = Boolean(chosen) && chosen.png === props.examples[i].png;
    button.classList.toggle("chosen", pressed);
    button.setAttribute("aria-pressed", pressed);
  });
  find("[data-from=none]").setAttribute("aria-pressed", !chosen);
  find("[data-from=none]").classList.toggle("chosen", !chosen);
  find("[data-from=result]").disabled = !window.ssmgenChosen;
}

props.examples.forEach((example, i) => {
  const button = document.createElement("button"), picture = document.createElement("img");
  button.type = "button";
  button.dataset.example = i;
  button.title = "Style of " + example.name;
  button.setAttribute("aria-label", button.title);
  picture.src = example.png;
  picture.alt = "";
  button.append(picture);
  find(".choices").append(button);
});

element.addEventListener("click", (event) => {
  const button = event.target.closest("button");
  if (!button) return;
  if (button.dataset.example) props.value = props.examples[Number(button.dataset.example)];
  else props.value = button.dataset.from === "result" ? window.ssmgenChosen : null;
  show();
});
document.addEventListener("ssmgen-chosen", show);
watch("value", show);
show();
