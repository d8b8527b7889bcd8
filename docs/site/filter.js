// A field above the table of architectures that hides the rows in which what is typed does not stand.
document.addEventListener("DOMContentLoaded", () => {
  const table = document.querySelector("[data-filter] ~ .md-typeset__scrollwrap table, [data-filter] ~ table")
  const field = document.querySelector("[data-filter]")
  if (!table || !field) return
  const rows = [...table.tBodies[0].rows].map((row) => [row, row.textContent.toLowerCase()])
  field.addEventListener("input", () => {
    const typed = field.value.trim().toLowerCase()
    for (const [row, text] of rows) row.hidden = !text.includes(typed)
  })
})
