// How far the pictures are.
const live = element.querySelector(".live");
watch("value", () => {
  const now = props.value;
  live.hidden = !now;
  if (!now) return;
  live.querySelector("progress").value = now.steps ? now.step / now.steps : 0;
  live.querySelector("span").textContent = now.steps ? "step " + now.step + " of " + now.steps : "waiting for the device";
  live.querySelector(".previews").replaceChildren(...now.images.map((address, i) => {
    const picture = document.createElement("img");
    picture.src = address;
    picture.alt = "image " + (i + 1) + " so far";
    return picture;
  }));
});
