// The picture that edits start from.
function showChosen() {
  if (!window.ssmgenChosen) return;
  const { png, mask, name } = window.ssmgenChosen, picture = element.querySelector("img");
  props.value = { png, mask };
  picture.src = png;
  picture.alt = name;
  picture.hidden = false;
  element.querySelector("p").textContent = "Starting from " + name + ". Choose another picture above to use it instead.";
}
document.addEventListener("ssmgen-chosen", showChosen);
showChosen();
