// The search page: a picture that is chosen or dropped is sent at once.

const form = document.getElementById("drop");
const input = document.getElementById("picture");

input.addEventListener("change", () => input.files.length && form.requestSubmit());
for (const [name, over] of [["dragover", true], ["dragleave", false], ["drop", false]]) {
  form.addEventListener(name, (event) => {
    event.preventDefault();
    form.classList.toggle("over", over);
  });
}
form.addEventListener("drop", (event) => {
  if (!event.dataTransfer.files.length) return;
  input.files = event.dataTransfer.files;
  form.requestSubmit();
});
