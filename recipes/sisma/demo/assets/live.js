// Progress of a job.
const live = element.querySelector(".live");
watch("value", () => {
  const now = props.value;
  live.hidden = !now;
  if (!now) return;
  live.querySelector(".done").style.width = 100 * now.step / now.steps + "%";
  live.querySelector("span").textContent = now.step ? "step " + now.step + " of " + now.steps : "waiting for its turn";
  live.querySelector(".previews").replaceChildren(...now.images.map((address, i) => {
    const picture = document.createElement("img");
    picture.src = address;
    picture.alt = "image " + (i + 1) + " so far";
    return picture;
  }));
});
