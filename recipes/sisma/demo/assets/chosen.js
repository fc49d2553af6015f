// The image that edits start from.
document.addEventListener("ssmgen-chosen", (event) => {
  const { png, mask, name } = event.detail, picture = element.querySelector("img");
  props.value = { png, mask };
  picture.src = png;
  picture.alt = name;
  picture.hidden = false;
  element.querySelector("p").textContent = "Starting from " + name + ". Choose another above to change that one.";
});
