// Headings sort their table. Everything is on the page without this.
for (const table of document.querySelectorAll("figure.table table")) {
  table.querySelectorAll("thead th").forEach((heading, index) => {
    const button = document.createElement("button");
    button.append(...heading.childNodes);
    heading.append(button);
    button.addEventListener("click", () => sort(table, heading, index));
  });
}

function sort(table, heading, index) {
  const sign = heading.ariaSort === "ascending" ? -1 : 1;
  for (const other of table.querySelectorAll("thead th")) other.removeAttribute("aria-sort");
  heading.setAttribute("aria-sort", sign > 0 ? "ascending" : "descending");
  const value = (row) => row.cells[index]?.dataset.sort;
  const compare = (a, b) => {
    // Rows without a number stay at the end, whichever way the others go.
    if (a === undefined || b === undefined) return (a === undefined) - (b === undefined);
    const numbers = a - b;
    return sign * (Number.isNaN(numbers) ? a.localeCompare(b, "en", { numeric: true }) : numbers);
  };
  const rows = [...table.tBodies[0].rows];
  table.tBodies[0].append(...rows.sort((a, b) => compare(value(a), value(b))));
}
