"use strict";
// A click on the title of a column sorts its table; a field above a long table keeps the rows that contain its words.
for (const table of document.querySelectorAll("table")) {
  const body = table.tBodies[0], rows = [...body.rows], heads = [...table.tHead.rows[0].cells];
  if (rows.length < 2) continue;
  heads.forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = head.textContent;
    head.replaceChildren(button);
    button.addEventListener("click", () => {
      const sign = head.getAttribute("aria-sort") === "ascending" ? -1 : 1;
      heads.forEach((one) => one.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", sign > 0 ? "ascending" : "descending");
      const key = (row) => {
        const text = row.cells[column].textContent.trim();
        return [["", "–"].includes(text), head.className === "right" ? parseFloat(text.replace("R² ", "")) : NaN, text];
      };
      const compare = ([emptyA, a, textA], [emptyB, b, textB]) =>
        emptyA - emptyB || sign * (a - b || textA.localeCompare(textB, "en", { numeric: true }));
      body.append(...rows.map((row) => [key(row), row]).sort(([a], [b]) => compare(a, b)).map(([, row]) => row));
    });
  });
  if (rows.length < 6) continue;
  const field = document.createElement("input");
  field.type = "search";
  field.placeholder = "filter rows";
  field.setAttribute("aria-label", "Filter the rows of the table below");
  field.addEventListener("input", () => {
    const words = field.value.toLowerCase().split(/\s+/);
    for (const row of rows) row.hidden = !words.every((word) => row.textContent.toLowerCase().includes(word));
  });
  table.parentElement.before(field);
}
