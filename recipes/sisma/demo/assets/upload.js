// The file goes to the server as text in the request; it is not stored there.
const input = element.querySelector("input");
input.addEventListener("change", () => {
  const file = input.files[0];
  if (!file) return;
  const reader = new FileReader();
  reader.onload = () => {
    // Larger files are refused by the server's words, without sending them.
    props.value = file.size > props.max_bytes ? "A".repeat(props.max_bytes * 4 / 3 + 8) : reader.result.split(",")[1] || "";
    trigger("upload");
    input.value = "";
  };
  reader.onerror = () => { props.value = ""; trigger("upload"); };
  reader.readAsDataURL(file);
});
