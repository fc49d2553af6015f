// The image that edits start from.
function take() {
  if (!window.ssmgenChosen) return;
  const { png, mask, name } = window.ssmgenChosen, picture = element.querySelector("img");
  props.value = { png, mask };
  picture.src = png;
  picture.alt = name;
  picture.hidden = false;
  element.querySelector("p").textContent = "Starting from " + name + ". Choose another above to change that one.";
}
document.addEventListener("ssmgen-chosen", take);
take();
