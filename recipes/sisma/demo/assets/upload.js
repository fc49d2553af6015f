// The request carries the file as text; the server does not store it.
const input = element.querySelector("input");
input.addEventListener("change", () => {
  const file = input.files[0];
  if (!file) return;
  const reader = new FileReader();
  reader.onload = () => {
    // A file above the limit is not sent: a text that is too long makes the server answer with its message.
    props.value = file.size > props.max_bytes ? "A".repeat(props.max_bytes * 4 / 3 + 8) : reader.result.split(",")[1] || "";
    trigger("upload");
    input.value = "";
  };
  reader.onerror = () => { props.value = ""; trigger("upload"); };
  reader.readAsDataURL(file);
});
