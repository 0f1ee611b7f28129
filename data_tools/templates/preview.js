"use strict";
// Without this script all rows are shown.
(() => {
  const form = document.getElementById("filter");
  const {words, count} = form.elements;
  const rows = [...document.querySelectorAll("article.row")];
  const texts = rows.map(row => row.textContent.toLowerCase());
  const filter = () => {
    const wanted = words.value.trim().toLowerCase();
    rows.forEach((row, place) => { row.hidden = !texts[place].includes(wanted); });
    count.value = `${rows.filter(row => !row.hidden).length} of ${rows.length} rows`;
  };
  form.addEventListener("input", filter);
  form.addEventListener("submit", event => event.preventDefault());
  form.hidden = false;
  filter();
})();
