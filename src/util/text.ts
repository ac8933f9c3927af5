// SPDX-License-Identifier: MIT
/** What is printed, for people and for programs. */

/** JSON escapes the control characters of ASCII only; a terminal obeys others as well. */
export function toJson(value: unknown): string {
  const escape = (character: string) => `\\u${character.charCodeAt(0).toString(16).padStart(4, '0')}`
  return `${JSON.stringify(value, null, 2).replace(/[\u007f-\u009f]/g, escape)}\n`
}

/** Rows in columns that are as wide as they must be. */
export function aligned(rows: readonly (readonly string[])[], right: (column: number) => boolean = () => false): string[] {
  const widths = rows[0]?.map((_, i) => Math.max(...rows.map((cells) => (cells[i] as string).length))) ?? []
  const pad = (cell: string, i: number) => (right(i) ? cell.padStart(widths[i] as number) : cell.padEnd(widths[i] as number))
  return rows.map((cells) => cells.map(pad).join(' ').trimEnd())
}

/** Names are made by users: control characters must not reach a terminal. */
export function printable(text: string): string {
  return text.replace(/[\u0000-\u001f\u007f-\u009f]/g, '?')
}
