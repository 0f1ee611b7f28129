"use strict";
// Without this script all rows are shown, and each is opened by itself.
(() => {
  const form = document.getElementById("filter");
  const {words, changed, toggle, count} = form.elements;
  const rows = [...document.querySelectorAll("details.row")];
  const texts = rows.map(row => row.textContent.toLowerCase());
  const filter = () => {
    const wanted = words.value.trim().toLowerCase();
    rows.forEach((row, place) => {
      row.hidden = !texts[place].includes(wanted) || (changed.checked && row.dataset.changed === "no");
    });
    count.value = `${rows.filter(row => !row.hidden).length} of ${rows.length} rows`;
  };
  const openAll = open => rows.forEach(row => { row.open = open; });
  toggle.addEventListener("click", () => {
    const opens = rows.some(row => !row.open);
    openAll(opens);
    toggle.textContent = opens ? "Close all" : "Open all";
  });
  form.addEventListener("input", filter);
  form.addEventListener("submit", event => event.preventDefault());
  addEventListener("beforeprint", () => openAll(true));
  form.hidden = false;
  filter();
})();
