package main

import (
	"cmp"
	_ "embed"
	"encoding/csv"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"

	"google.golang.org/protobuf/proto"

	"github.com/coppice-project/coppice/plugins/sdk"
	shopv1 "github.com/coppice-project/coppice/plugins/shop/v1"
)

//go:embed catalogue.csv
var catalogueCSV string

// catalogue is what the binary knows about books: everything but how many are left, which is state. It does not change after it was read.
type catalogue struct {
	books  []*shopv1.Book // by title; in_stock is the first delivery
	byISBN map[string]*shopv1.Book
	words  []string // for each book, what a query is looked up in
}

const columns = 8

func readCatalogue() (*catalogue, error) {
	reader := csv.NewReader(strings.NewReader(catalogueCSV))
	reader.FieldsPerRecord = columns
	rows, err := reader.ReadAll()
	if err != nil {
		return nil, fmt.Errorf("catalogue: %w", err)
	}
	if len(rows) < 2 {
		return nil, errors.New("catalogue: no books in it")
	}
	c := &catalogue{byISBN: map[string]*shopv1.Book{}}
	for i, row := range rows[1:] {
		b, err := readBook(row)
		if err == nil && c.byISBN[b.GetIsbn()] != nil {
			err = fmt.Errorf("ISBN %s is there twice", b.GetIsbn())
		}
		if err != nil {
			return nil, fmt.Errorf("catalogue: line %d: %w", i+2, err)
		}
		c.byISBN[b.GetIsbn()] = b
		c.books = append(c.books, b)
	}
	slices.SortFunc(c.books, func(a, b *shopv1.Book) int {
		return cmp.Or(strings.Compare(a.GetTitle(), b.GetTitle()), strings.Compare(a.GetIsbn(), b.GetIsbn()))
	})
	for _, b := range c.books {
		c.words = append(c.words, strings.ToLower(b.GetTitle()+"\n"+b.GetAuthor()+"\n"+b.GetSubject()))
	}
	return c, nil
}

func readBook(row []string) (*shopv1.Book, error) {
	if err := checkISBN(row[0]); err != nil {
		return nil, err
	}
	var numbers [3]uint64
	for i, column := range []int{4, 6, 7} {
		n, err := strconv.ParseUint(row[column], 10, 32)
		if err != nil {
			return nil, fmt.Errorf("column %d: %q is not a number", column+1, row[column])
		}
		numbers[i] = n
	}
	return &shopv1.Book{
		Isbn: row[0], Title: row[1], Author: row[2], Subject: row[3], Publisher: row[5],
		Year: uint32(numbers[0]), PriceCents: numbers[1], InStock: numbers[2],
	}, nil
}

// checkISBN checks the form and the check digit of an ISBN-13.
func checkISBN(isbn string) error {
	if len(isbn) != 13 {
		return fmt.Errorf("ISBN %.20q has %d characters, not 13", isbn, len(isbn))
	}
	sum := 0
	for i, d := range isbn {
		if d < '0' || d > '9' {
			return fmt.Errorf("ISBN %q: %q is not a digit", isbn, d)
		}
		sum += int(d-'0') * (1 + 2*(i%2))
	}
	if sum%10 != 0 {
		return fmt.Errorf("ISBN %s: the check digit is wrong", isbn)
	}
	return nil
}

// deliver stocks the books that the shop has never had: all of them at the first start, the new ones of a later version's catalogue.
func (c *catalogue) deliver(tx *sdk.Txn) {
	delivered := tx.Uint64(keyDelivered)
	before := delivered
	for _, b := range c.books {
		if !tx.Has(stockKey(b.GetIsbn())) {
			tx.PutUint64(stockKey(b.GetIsbn()), b.GetInStock())
			delivered += b.GetInStock()
		}
	}
	if delivered != before {
		tx.PutUint64(keyDelivered, delivered)
	}
}

// find returns the books that hold every word of the query, by title.
func (c *catalogue) find(query string) []*shopv1.Book {
	wanted := strings.Fields(strings.ToLower(query))
	if len(wanted) == 0 {
		return c.books
	}
	var out []*shopv1.Book
	for i, b := range c.books {
		if !slices.ContainsFunc(wanted, func(w string) bool { return !strings.Contains(c.words[i], w) }) {
			out = append(out, b)
		}
	}
	return out
}

// withStock returns a copy of a book as it is now.
func withStock(tx *sdk.Txn, b *shopv1.Book) *shopv1.Book {
	out := proto.CloneOf(b)
	out.InStock = tx.Uint64(stockKey(b.GetIsbn()))
	return out
}
