// Above each long table, a field that hides the rows in which what is typed does not stand.
document.addEventListener("DOMContentLoaded", () => {
  for (const table of document.querySelectorAll("article table")) {
    const rows = [...table.tBodies[0].rows].map((row) => [row, row.textContent.toLowerCase()])
    if (rows.length < 60) continue
    const field = document.createElement("input")
    field.type = "search"
    field.className = "row-filter"
    field.placeholder = `Filter these ${rows.length} rows`
    field.ariaLabel = field.placeholder
    field.addEventListener("input", () => {
      const typed = field.value.trim().toLowerCase()
      for (const [row, text] of rows) row.hidden = !text.includes(typed)
    })
    ;(table.closest(".md-typeset__scrollwrap") ?? table).before(field)
  }
})
